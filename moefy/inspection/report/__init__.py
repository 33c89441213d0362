"""The report of an inspection: one offline HTML file, a folder to serve, plots, other tools' formats.

`page.write_report(inspection, "report.html")` writes it, `page.Report(inspection)` shows itself in a
notebook.
"""
