"""Score a model on pairs that it was not trained on, or two models side by side.

    nafnet evaluate runs/mine stores/test
    nafnet evaluate models:/nafnet-deblur@champion blurred/ sharp/
    nafnet evaluate mine stores/test --workers 8 --perceptual --out report/
    nafnet evaluate mine other stores/test          # B against A, with an interval of the difference

The protocol is pinned and written into the report: whole images, one at a time, fp32, one thread an image,
local statistics on. A report is a folder: `report.json`, `report.md`, `report.html`, `images.csv`, pictures.
Reports are kept in the workspace under the digests of weights and data, where promotion finds them. Each says
whether local statistics were on; `--train-patch 0` makes the other one, to compare.
"""

from pipelines.evaluate.comparison import CompareResult, compare
from pipelines.evaluate.difference import Comparison, difference_of
from pipelines.evaluate.driver import EvaluateResult, installed_judge, run
from pipelines.evaluate.report import (
    SCHEMA_VERSION,
    Report,
    comparable,
    find_report,
    read_report,
    report_path,
)
from pipelines.scoring.pairs import Pairs

__all__ = [
    "SCHEMA_VERSION",
    "CompareResult",
    "Comparison",
    "EvaluateResult",
    "Pairs",
    "Report",
    "comparable",
    "compare",
    "difference_of",
    "find_report",
    "installed_judge",
    "read_report",
    "report_path",
    "run",
]
