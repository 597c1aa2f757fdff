"""`nafnet prepare`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nafnet_core.errors import InputError
from pipelines import console
from pipelines.cli.shared import AddressOption, JsonOption, output_to, print_lines

if TYPE_CHECKING:
    from pipelines.sources import Source

app = typer.Typer()


@app.command(
    epilog="Examples: nafnet prepare pairs --out store --crop 512 --stride 256; "
    "nafnet prepare photos --sharp --out store --crop 0 --format lmdb --codec raw"
)
def prepare(
    out: Annotated[str, typer.Option("--out", help="Folder to write, or its URL.")],
    source: Annotated[
        str | None,
        typer.Argument(
            help="Folder with blur/ and sharp/; GoPro, HIDE, RealBlur or REDS; a CSV or JSONL list; or a URL."
        ),
    ] = None,
    lq: Annotated[
        str | None, typer.Option(help="Folder or LMDB of blurred images, instead of SOURCE.")
    ] = None,
    gt: Annotated[str | None, typer.Option(help="Folder or LMDB of sharp images, instead of SOURCE.")] = None,
    sharp: Annotated[
        bool,
        typer.Option("--sharp", help="SOURCE is a folder of sharp photos, to be blurred in training."),
    ] = False,
    lq_name: Annotated[str, typer.Option(help="Name of the blurred file, {} being the sharp one's.")] = "{}",
    blur: Annotated[
        str | None,
        typer.Option(
            help="Blurred version. GoPro: blur, blur_gamma. REDS: blur, blur_comp, blur_jpeg. RealBlur: J, R."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test: the part of SOURCE to take.")] = "train",
    holdout: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=0.9, help="Keep this share of the scenes for --split test or val, and out of train."
        ),
    ] = None,
    format: Annotated[str, typer.Option(help="parquet or lmdb.")] = "parquet",
    codec: Annotated[str, typer.Option(help="png or raw (lmdb only).")] = "png",
    crop: Annotated[
        int, typer.Option(min=0, help="Side of the crops; 0 keeps whole images, to evaluate.")
    ] = 512,
    stride: Annotated[int, typer.Option(min=1, help="Distance between crops.")] = 256,
    min_remainder: Annotated[
        int,
        typer.Option(
            min=0,
            help="Up to so many px beyond the last crop are left out; more get a crop of their own.",
        ),
    ] = 0,
    pairs_per_shard: Annotated[
        int, typer.Option(min=1, help="Source pairs in one file; 32 of 1280×720 make some 200 MB.")
    ] = 32,
    max_megapixels: Annotated[
        float | None,
        typer.Option(min=0.001, help="Larger images are refused unread. [default: 178.9, Pillow's limit]"),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad pair.")] = False,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a paired data set into a store that trains fast. Goes on where it was interrupted.

    16-bit images are rounded to 8 bit, alpha is dropped. Pairs that cannot be used are listed in
    quarantine.jsonl; pairs that look wrong (another picture, shifted, identical) are kept, and listed in
    suspects.jsonl. With --sharp, a store holds photos alone, which training blurs anew each time.
    """
    from pipelines import prepare as stage
    from pipelines.duplicates import warn_of_shared_sharp
    from pipelines.images import MAX_MEGAPIXELS
    from pipelines.sources import hold_out
    from pipelines.urls import absolute, is_url, local_path, public

    for name, value, known in (
        ("--format", format, ("parquet", "lmdb")),
        ("--codec", codec, ("png", "raw")),
        ("--split", split, ("train", "val", "test")),
    ):
        if value not in known:
            raise InputError(f"unknown {name}", got=value, expected=" or ".join(known))
    if sharp and (source is None or lq or gt or blur or lq_name != "{}"):
        raise InputError(
            "--sharp takes a folder of sharp photos, and nothing blurred",
            fix="Give SOURCE, and leave out --lq, --gt, --lq-name and --blur",
        )
    if source is not None and (lq is not None or gt is not None):
        raise InputError(
            "SOURCE and --lq or --gt exclude each other", fix="Give SOURCE, or both --lq and --gt"
        )
    found = _source(source, lq, gt, sharp=sharp, split=split, lq_name=lq_name, blur=blur)
    refs = found.pairs()
    if holdout is not None:
        warn_of_shared_sharp(refs)
        refs = hold_out(refs, holdout, test=split != "train")
    settings = stage.PrepareConfig(
        out=local_path(absolute(out)) if is_url(out) else Path(out).absolute(),
        split=split,
        format=format,  # type: ignore[arg-type]
        codec=codec,  # type: ignore[arg-type]
        crop_px=crop or None,
        stride_px=stride,
        min_remainder_px=min_remainder,
        pairs_per_shard=pairs_per_shard,
        max_megapixels=MAX_MEGAPIXELS if max_megapixels is None else max_megapixels,
        strict=strict,
    )
    shown = public(out)
    with output_to(as_json) as output:
        needs_ray = len(refs) > pairs_per_shard
        with _connected(needs_ray, address), console.progress("prepare", "shards") as update:
            result = stage.run(found, refs, settings, on_progress=update)
        manifest = result.manifest
        if output.as_json:
            output.print_json(manifest.model_dump())
            return
    what = "sharp images" if sharp else "pairs"
    print_lines(
        f"{manifest.num_pairs} {what} from {len(refs)} images in {len(manifest.shards)} shards, "
        f"{manifest.num_refused} refused; digest {manifest.digest[:12]}."
    )
    if result.refused:
        print_lines(
            f"Refused, with the reasons: quarantine.jsonl in {shown}. First: {result.refused[0]['reason']}"
        )
    if result.suspects:
        first = result.suspects[0]
        print_lines(
            f"{manifest.num_suspect} image pairs look wrong and were kept, see suspects.jsonl in {shown}. "
            f"First: {first['key']}, {first['reason']}"
        )
    if sharp:
        print_lines(
            f"Next: nafnet train --config mobile --data {shown} --set 'data.train.0.blur.kinds=[shake]' "
            "--val STORE_OF_WHOLE_PAIRS"
        )
    elif split == "train":
        print_lines(f"Next: nafnet train --config mobile --data {shown} --val STORE_OF_WHOLE_IMAGES")
    else:
        print_lines(f"Next: nafnet evaluate MODEL {shown}")


def _source(
    source: str | None,
    lq: str | None,
    gt: str | None,
    *,
    sharp: bool,
    split: str,
    lq_name: str,
    blur: str | None,
) -> Source:
    from pipelines.sources import SharpPhotos, find_source, place, two_sides

    if lq is not None and gt is not None:
        return two_sides(place(lq), place(gt), lq_name=lq_name)
    if source is None:
        raise InputError("no source", fix="Give SOURCE, or both --lq and --gt")
    if sharp:
        return SharpPhotos(root=place(source))
    return find_source(place(source), split=split, lq_name=lq_name, blur=blur)


@contextmanager
def _connected(needed: bool, address: str | None) -> Iterator[None]:
    if not needed:
        yield
        return
    from cluster.connect import connect

    with connect(address):
        yield
