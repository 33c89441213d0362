"""What taking experts away does, with controls that had the same energy."""
