"""A built folder as a software bill of materials: CycloneDX 1.6, the model as what it is about, files, tools."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from edgecomp.artifact import FILES
from edgecomp.files import OVERVIEW, PLAN_FILE
from edgecomp.folder import BuiltFolder

from .to_c import KERNELS

if TYPE_CHECKING:
    from cyclonedx.model import HashType, Property

_PROGRAMS = ("edgecomp", "python")
_LICENSE = "Apache-2.0"
"""Of edgecomp, and so of the kernels it writes beside a network in C. A network's own is not known to us."""


def to_cyclonedx(folder: BuiltFolder) -> str:
    """Write the bill of a folder: equal folders give equal text, without time or random numbers.

    Every file but the page for people is read and must have the digest that is written down for it.

    Raises:
        BundleError: a file is missing or was changed after the build.
        ImportError: cyclonedx-python-lib is not installed.
    """
    from cyclonedx.model import bom, component, license, tool
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    record = folder.record
    files = {name: digest for name, digest in record["files"].items() if name != OVERVIEW}
    of_artifact = {a["path"]: a for a in record["artifacts"]}
    known, parts = component.ComponentType, {}
    for name, digest in files.items():
        size = len(folder.read(name))
        facts = {"bytes": size}
        if name in of_artifact:
            accuracy = of_artifact[name]["accuracy"]
            facts |= {"accuracy_percent": accuracy["value"], "accuracy_images": accuracy.get("n", "unknown")}
            facts |= {"accuracy_runtime": accuracy["runtime"]}
        parts[name] = component.Component(
            type=known.FILE,
            name=name,
            bom_ref=f"file:{name}",
            hashes=[_sha256(digest)],
            licenses=[license.DisjunctiveLicense(id=_LICENSE)] if name in KERNELS else (),
            properties=_properties(facts),
        )
    floating = record["float"]
    facts = {key: record[key] for key in ("data", "graph_digest")} | {"float_accuracy_percent": floating["accuracy"]}
    model = component.Component(
        type=known.MACHINE_LEARNING_MODEL,
        name=record["model"],
        version=files[PLAN_FILE][:12],
        bom_ref="model",
        properties=_properties(facts | {f"sha256 of {what}": digest for what, digest in record["inputs"].items()}),
    )
    tools = [
        component.Component(
            type=known.APPLICATION if name in _PROGRAMS else known.LIBRARY,
            name=name,
            version=entry["version"],
            bom_ref=f"tool:{name}",
            hashes=[_sha256(entry["sha256"])],
            licenses=[license.DisjunctiveLicense(id=_LICENSE)] if name == "edgecomp" else (),
            purl=None if name in _PROGRAMS else PackageURL("pypi", name=name, version=entry["version"]),
        )
        for name, entry in record["tools"].items()
    ]
    content = " ".join(f"{name} {digest}" for name, digest in sorted(files.items()))
    bill = bom.Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, content),
        components=parts.values(),
        metadata=bom.BomMetaData(component=model, tools=tool.ToolRepository(components=tools)),
    )
    bill.metadata.timestamp = None
    bill.register_dependency(model, parts.values())
    sources = [part for name, part in parts.items() if not any(name in names for names in FILES.values())]
    for name in of_artifact:
        bill.register_dependency(parts[name], sources)
    return JsonV1Dot6(bill).output_as_string(indent=2) + "\n"


def _sha256(digest: str) -> HashType:
    from cyclonedx.model import HashAlgorithm, HashType

    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _properties(facts: dict[str, object]) -> list[Property]:
    from cyclonedx.model import Property

    return [Property(name=f"edgecomp:{name}", value=str(value)) for name, value in facts.items()]
