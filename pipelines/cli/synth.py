"""`nafnet synth`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from nafnet_core.errors import InputError
from pipelines import console
from pipelines.cli.shared import AddressOption, JsonOption, OutOption, output_to, print_lines

if TYPE_CHECKING:
    from pipelines.synth import SynthResult

app = typer.Typer()
_MAX_SHOWN = 20


@app.command(
    epilog="Examples: nafnet synth photos --out pairs --variants 4; "
    "nafnet synth frames240 --out pairs --average 7:15"
)
def synth(
    sharp: Annotated[
        list[Path],
        typer.Argument(help="Sharp photos, or folders of them; with --average, videos or folders of frames."),
    ],
    out: OutOption,
    variants: Annotated[int, typer.Option(min=1, help="Differently blurred copies of each photo.")] = 1,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="shake, varying, defocus, gaussian, measured; repeatable. [default: shake]"),
    ] = None,
    min_size: Annotated[float, typer.Option(help="Smallest extent of the blur, px.")] = 3.0,
    max_size: Annotated[float, typer.Option(help="Largest extent of the blur, px.")] = 15.0,
    average: Annotated[
        str | None,
        typer.Option(
            help="Average so many consecutive frames, 7, or 7:15 for a number drawn anew for each pair. Odd: "
            "the one in the middle is the sharp image."
        ),
    ] = None,
    window_stride: Annotated[
        int | None,
        typer.Option(
            min=1, help="Frames from one window's start to the next's. [default: its length, no overlap]"
        ),
    ] = None,
    max_noise: Annotated[
        float | None,
        typer.Option(help="Read noise, linear light, 1 is white. [default: 0.004; 0 with --average]"),
    ] = None,
    jpeg_quality: Annotated[
        int | None, typer.Option(min=1, max=95, help="Compress blurred images: from this quality to 95.")
    ] = None,
    max_side: Annotated[
        int | None, typer.Option(min=64, help="Shrink photos and frames to this longer side.")
    ] = None,
    encoded_share: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share blurred as encoded, as GoPro's `blur`; the rest in linear light."
        ),
    ] = 0.0,
    kernels: Annotated[
        Path | None,
        typer.Option(help="Folder of measured kernels, gray images or .mat, for kind measured."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and names give the same pixels.")] = 0,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make blurred/sharp pairs from sharp photos, or from the frames of high-speed video.

    Goes on where it was interrupted.
    """
    from pipelines import synth as stage

    known = get_args(stage.BlurKind)
    for name in kind or ():
        if name not in known:
            raise InputError("unknown kind of blur", got=name, expected=", ".join(known))
    if kind and average:
        raise InputError(
            "--kind and --average exclude each other",
            expected="frames have their own blur",
            fix="Leave one of them out",
        )
    settings = stage.SynthConfig(
        sharp=sharp,
        out=out,
        seed=seed,
        variants=variants,
        kinds=tuple(kind or ("shake",)),  # type: ignore[arg-type]
        min_size_px=min_size,
        max_size_px=max_size,
        max_noise=max_noise,
        min_jpeg_quality=jpeg_quality,
        max_side_px=max_side,
        encoded_share=encoded_share,
        kernels=kernels,
        average=None if average is None else _range(average),
        window_stride=window_stride,
        address=address,
    )
    unit = "photos" if average is None else ""
    with output_to(as_json) as output:
        with console.progress("synth", unit) as update:
            result = stage.run(settings, on_progress=update)
        if output.as_json:
            output.print_json(
                {
                    "pairs": result.num_pairs,
                    "kept": result.num_kept,
                    "refused": result.refused,
                    "notes": result.notes,
                    "out": out,
                    "contact_sheet": result.contact_sheet,
                }
            )
            return
    _say_remarks(result)
    kept = f", {result.num_kept} of them there already" if result.num_kept else ""
    what = "photos" if average is None else "windows or sequences"
    print_lines(
        f"{result.num_pairs} pairs in {out}{kept}; {len(result.refused)} {what} refused. "
        f"Look at {result.contact_sheet}.",
        f"Next: nafnet prepare {out} --out STORE, with --crop 0 --split test if it is to evaluate on",
    )


def _say_remarks(result: SynthResult) -> None:
    for lines, label in ((result.notes, ""), (result.refused, "refused: ")):
        for line in lines[:_MAX_SHOWN]:
            console.say(f"{label}{line}")
        if len(lines) > _MAX_SHOWN:
            console.say(f"… and {len(lines) - _MAX_SHOWN} more; --json lists all")


def _range(text: str) -> tuple[int, int]:
    """`7` or `7:15`."""
    try:
        low, *rest = (int(part) for part in text.split(":"))
        (high,) = rest or (low,)
        return low, high
    except ValueError as error:
        raise InputError(
            "unusable --average", got=text, expected="an odd number, or two with a colon: 7 or 7:15"
        ) from error
