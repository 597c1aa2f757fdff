"""Blurred/sharp pairs from sharp photos, or from the frames of high-speed video.

    nafnet synth photos/ --out pairs/ --variants 4
    nafnet synth photos/ --out pairs/ --max-side 320 --variants 1      # a laptop's minute
    nafnet synth frames240/ --out pairs/ --average 7:15                # as GoPro was made

Writes `pairs/blur/NAME/0.png`, `pairs/sharp/NAME/0.png`, `pairs/degradations.jsonl` with the parameters of
each pair, `pairs/synth.json` with the settings of all, and `pairs/contact_sheet.png` to look at.
"""

from nafnet_core.blur import BlurKind
from pipelines.synth.config import SynthConfig, SynthResult
from pipelines.synth.pairs import run

__all__ = ["BlurKind", "SynthConfig", "SynthResult", "run"]
