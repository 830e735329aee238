"""Reports: pictures of a run, and a page in one file that needs no network, no script and no other file."""

from lorakit.report.build import run_report
from lorakit.report.metrics import read_metrics
from lorakit.report.parts import Curve, Fact, Picture, Report, Sample, Table
from lorakit.report.pictures import save_picture
from lorakit.report.svg import curve_svg
from lorakit.report.write import write_report

__all__ = [
    "Curve",
    "Fact",
    "Picture",
    "Report",
    "Sample",
    "Table",
    "curve_svg",
    "read_metrics",
    "run_report",
    "save_picture",
    "write_report",
]
