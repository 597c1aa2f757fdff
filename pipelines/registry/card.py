"""The model card: what a version is, what it was trained on, how it scores, where its limits are.

As JSON for programs (`card.json`) and as Markdown for people (`MODEL_CARD.md`), from the same content.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from nafnet_core import InputError
from pipelines.evaluate import Report
from pipelines.models import LoadedModel
from pipelines.store import read_manifest

_PACKAGES = ("mlflow", "torch", "numpy", "opencv-python-headless", "safetensors")
_LEFT_OUT = {"images", "by_scene"}  # of a report: as long as the data set
_LIMITS = (
    "Trained to undo blur; noise, low resolution and JPEG blocks are not its task.",
    "Photos blurred in another way than the training data's are restored less well, and may get worse.",
    "8-bit and 16-bit RGB. Detail that the blur has destroyed is not recovered but made plausible: not for "
    "evidence, measurements or diagnosis.",
)


def environment() -> list[str]:
    """The versions that the model was registered with, as pip requirements.

    Without the local part, as of `2.13.0+cpu`: no registry of packages has that.
    """
    return [f"{package}=={version(package).partition('+')[0]}" for package in _PACKAGES]


def make_card(loaded: LoadedModel, digest: str, report: Report | None) -> dict[str, Any]:
    """The card's content.

    Args:
        loaded: the model as it was registered.
        digest: SHA-256 of the weights file in the version.
        report: its scores, if it was scored.
    """
    training = {name: value for name, value in loaded.metadata.items() if name != "config"}
    return {
        "model": loaded.label,
        "weights_digest": digest,
        "num_parameters": loaded.model.num_parameters,
        "macs_256_px": loaded.model.config.num_macs(256, 256),
        "config": loaded.model.config.to_dict(),
        "training": training,
        "data": _data(training),
        "report": None if report is None else report.model_dump(exclude=_LEFT_OUT),
        "limits": list(_LIMITS),
        "environment": {"python": platform.python_version(), "packages": environment()},
    }


def as_markdown(card: dict[str, Any]) -> str:
    """The card for people."""
    training, report = card["training"], card["report"]
    patch = training.get("train_patch_px")
    facts = {
        "Model": card["model"],
        "Parameters": f"{card['num_parameters']:,}",
        "Operations": f"{card['macs_256_px'] / 1e9:.2f} GMAC on 256×256 px",
        "Network": ", ".join(f"{name} {value}" for name, value in card["config"].items()),
        "Weights": f"SHA-256 {card['weights_digest']}",
        "Local statistics": f"on, training patch {patch} px" if patch else "off",
        "Training": f"{training['samples']:,} samples" if "samples" in training else "unknown",
    }
    if "pruned" in training:
        before = training["pruned"]
        facts["Pruned"] = f"from {before['from']}, of which training and recipe are; not trained since"
    lines = ["# NAFNet for image deblurring", "", *_table(("", ""), facts.items())]
    lines += ["", "## Training data", ""]
    if card["data"]:
        rows = [(data["place"], data["digest"], data["licence"]) for data in card["data"]]
        lines += _table(("store", "digest", "licence"), rows)
    else:
        lines.append("Unknown: the weights do not say it. So is its licence.")
    lines += ["", "## Scores", ""]
    if report is None:
        lines.append("None yet: `nafnet registry register MODEL --on STORE` scores it.")
    else:
        lines += _scores(report)
    lines += ["", "## Limits", "", *(f"- {limit}" for limit in card["limits"])]
    if "recipe" in training:
        recipe = training["recipe"]
        optim, loss = recipe.get("optim", {}), recipe.get("loss", {})
        stages = ", ".join(f"{s.get('patch_px')} px × {s.get('batch')}" for s in recipe.get("stages", ()))
        schedule = recipe.get("schedule", {})
        losses = ", ".join(f"{name} {weight}" for name, weight in loss.items() if weight)
        told = {
            "learning rate": optim.get("lr"),
            "schedule": ", ".join(f"{name} {value}" for name, value in schedule.items() if value),
            "stages": stages,
            "loss": losses,
            "seed": recipe.get("seed"),
        }
        lines += ["", "## Recipe", "", *_table(("", ""), told.items())]
        lines += ["", "The whole of it is in `config.json`."]
    python, packages = card["environment"]["python"], card["environment"]["packages"]
    lines += ["", "## Environment", "", f"Python {python}, {', '.join(packages)}", ""]
    return "\n".join(lines)


def summary(card: dict[str, Any]) -> str:
    """A few lines, which MLflow shows beside the version."""
    report = card["report"]
    scored = "Not scored."
    if report is not None:
        gain = report["psnr_restored_db"] - report["psnr_blurred_db"]
        scored = f"{report['psnr_restored_db']:.2f} dB ({gain:+.2f}) on {report['data']}."
    return f"{card['model']}: {card['num_parameters']:,} parameters. {scored} More in MODEL_CARD.md."[:1000]


def _scores(report: dict[str, Any]) -> list[str]:
    rows = [("PSNR, dB", f"{report['psnr_blurred_db']:.2f}", f"{report['psnr_restored_db']:.2f}")]
    if report["ssim_restored"] is not None:
        rows.append(("SSIM", f"{report['ssim_blurred']:.4f}", f"{report['ssim_restored']:.4f}"))
    protocol = ", ".join(f"{name} {value}" for name, value in report["protocol"].items())
    return [
        *_table(("", "blurred input", "restored"), rows),
        "",
        f"Means over {report['num_images']} images of {report['data']}, digest {report['data_digest']}.",
        f"Protocol: {protocol}.",
    ]


def _data(training: dict[str, Any]) -> list[dict[str, str]]:
    """Stores that the model was trained on; their licence where the store is still the one it was."""
    digests = training.get("store_digests") or []
    recipe = training.get("recipe") or {}
    places = [store.get("path", "") for store in recipe.get("data", {}).get("train", ())]
    places += [""] * (len(digests) - len(places))
    return [
        {"place": str(place), "digest": digest, "licence": _licence(str(place), digest)}
        for place, digest in zip(places, digests, strict=False)
    ]


def _licence(place: str, digest: str) -> str:
    try:
        manifest = read_manifest(place)
    except (InputError, OSError, ValueError):
        return "unknown: the store is not where it was"
    return manifest.licence if manifest.digest == digest else "unknown: the store was made anew"


def _table(header: tuple[str, ...], rows: Any) -> list[str]:
    cells = [header, ("---",) * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells]
