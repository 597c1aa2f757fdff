"""KubeRay's own schema of `RayCluster` and `RayJob`, cut to what a check needs.

The API server drops a field that the schema does not know, without a word; here it is refused.

`kuberay_crds.json.gz` is made of KubeRay 1.7.0 (github.com/ray-project/kuberay, commit 59d663a, Apache
License 2.0), of helm-chart/kuberay-operator/crds, without the descriptions:

    python -m tests.cluster.crds FOLDER_OF_CRDS

NAFNET_KUBERAY_CRDS names such a folder of another version, to check against that one as well.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SHIPPED = Path(__file__).parent / "kuberay_crds.json.gz"
_FILES = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}
_KEPT = ("x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string")

Schema = dict[str, Any]


def read_folder(folder: Path) -> dict[str, Schema]:
    """Kind → schema, from the definitions as KubeRay ships them."""
    schemas = {}
    for kind, name in _FILES.items():
        definition = yaml.load((folder / name).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
        schemas[kind] = _cut(version["schema"]["openAPIV3Schema"])
    return schemas


def read_shipped() -> dict[str, Schema]:
    """The same from the file beside this one."""
    return json.loads(gzip.decompress(SHIPPED.read_bytes()))


def faults(manifest: dict[str, Any], schema: Schema) -> list[str]:
    """What is wrong with a manifest by a schema from one of the two above."""
    # Not `jsonschema.validate`, which would check the schema as well, for seconds.
    found = jsonschema.Draft202012Validator(strict(schema)).iter_errors(manifest)
    return [f"{fault.json_path}: {fault.message}" for fault in found]


def strict(schema: Any) -> Any:
    """A structural schema as JSON schema that refuses what Kubernetes would drop."""
    if not isinstance(schema, dict):  # `additionalProperties: true`
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **{k: v for k, v in schema.items() if k == "pattern"}}
    made = dict(schema)
    loose = made.pop("x-kubernetes-preserve-unknown-fields", False)
    for key in ("items", "additionalProperties"):
        if key in made:
            made[key] = strict(made[key])
    if "properties" in made:
        made["properties"] = {name: strict(part) for name, part in made["properties"].items()}
        if not loose:
            made.setdefault("additionalProperties", False)
    return made


def _cut(node: Any) -> Any:
    if isinstance(node, list):
        return [_cut(part) for part in node]
    if not isinstance(node, dict):
        return node
    kept: Schema = {}
    for key, value in node.items():
        if key == "properties":
            kept[key] = {name: _cut(part) for name, part in value.items()}
        elif not (key == "description" or (key.startswith("x-kubernetes-") and key not in _KEPT)):
            kept[key] = _cut(value)
    return kept


if __name__ == "__main__":
    text = json.dumps(read_folder(Path(sys.argv[1])), separators=(",", ":"), sort_keys=True)
    SHIPPED.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
