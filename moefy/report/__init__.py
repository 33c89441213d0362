"""The report of an inspection: one offline HTML file, a folder to serve, plots, other tools' formats.

write_report(inspection, "report.html")
Report(inspection)                        # shows itself in a notebook
"""

from moefy.report.neuronpedia import export_neuronpedia as export_neuronpedia
from moefy.report.page import Report as Report
from moefy.report.page import write_report as write_report
from moefy.report.plots import save_plots as save_plots
