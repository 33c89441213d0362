"""`python -m moefy`, and what `accelerate launch -m moefy` starts in every process."""

from moefy.cli.verbs import main

if __name__ == "__main__":
    main()
