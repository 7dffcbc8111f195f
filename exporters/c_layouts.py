"""Networks in C as other build systems expect them: libraries for Arduino and PlatformIO, Zephyr modules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from edgecomp import __version__
from edgecomp.artifact import FILES

from .c_facts import NetworkFacts, read_facts

SOURCE, HEADER, *_ = FILES["c"]
_LONGEST_NAME = 63
"""Of an Arduino library."""


def layout_files(files: Mapping[str, bytes], layout: str) -> Mapping[str, bytes]:
    """Put a network into a layout.

    Args:
        files: what `files_of` gives for C.
        layout: a key of LAYOUTS.

    Returns:
        all files by their paths in the folder, with "/" between.
    """
    facts = read_facts(files[SOURCE], SOURCE)
    return LAYOUTS[layout](files, facts)


def layout_names(layout: str) -> tuple[str, ...]:
    """List what of a layout does not depend on the network's name: what must not be there before it is written."""
    return FILES["c"] if layout == "flat" else tuple(f"src/{name}" for name in FILES["c"])


def _flat(files: Mapping[str, bytes], facts: NetworkFacts) -> Mapping[str, bytes]:
    return files


def _sources(files: Mapping[str, bytes], facts: NetworkFacts) -> dict[str, bytes]:
    """Give src/, with a header of the network's own name: that of the source would be found in any such library."""
    own = f'/* The network {facts.name}: what {HEADER} says. */\n#include "{HEADER}"\n'
    return {f"src/{facts.name}.h": own.encode(), **{f"src/{name}": data for name, data in files.items()}}


def _described(facts: NetworkFacts) -> dict[str, str]:
    version = re.match(r"\d+\.\d+\.\d+", __version__)
    return {
        "name": f"edgecomp_{facts.name}"[:_LONGEST_NAME],
        "version": version[0] if version else "0.0.0",
        "sentence": f"The neural network {facts.name}, as C99 with packed weights.",
        "paragraph": f"{facts.constant_bytes:,} bytes of weights in flash, {facts.arena_bytes:,} of RAM for the arena.",
    }


def _arduino(files: Mapping[str, bytes], facts: NetworkFacts) -> Mapping[str, bytes]:
    """Give what Arduino and PlatformIO read; both compile all of src/."""
    said = _described(facts)
    properties = {
        **{key: said[key] for key in ("name", "version")},
        "author": "edgecomp",
        "maintainer": "edgecomp",
        **{key: said[key] for key in ("sentence", "paragraph")},
        "category": "Data Processing",
        # There has to be a URI; that of what the network computes is one that leads nobody astray.
        "url": f"urn:sha256:{facts.graph_digest}",
        "architectures": "*",
        "includes": f"{facts.name}.h",
        # Two networks have the same kernels: from archives, a linker takes them once.
        "dot_a_linkage": "true",
    }
    library = {
        "name": said["name"],
        "version": said["version"],
        "description": f"{said['sentence']} {said['paragraph']}",
        "frameworks": "*",
        "platforms": "*",
        "headers": f"{facts.name}.h",
        "build": {"srcDir": "src", "includeDir": "src"},
    }
    return {
        "library.properties": "".join(f"{key}={value}\n" for key, value in properties.items()).encode(),
        "library.json": (json.dumps(library, indent=2) + "\n").encode(),
        "examples/Run/Run.ino": _sketch(facts).encode(),
        **_sources(files, facts),
    }


def _sketch(facts: NetworkFacts) -> str:
    name, upper = facts.name, facts.name.upper()
    return f"""\
// Runs {name} once a second and says how long it took; fill `in` from a sensor: {name}_quantize() takes real numbers.
#include <{name}.h>

static int32_t arena[{upper}_ARENA_BYTES / 4 + 1];
static int8_t in[{upper}_INPUT_BYTES], out[{upper}_OUTPUT_BYTES];

void setup() {{
  Serial.begin(115200);
}}

void loop() {{
  unsigned long start = micros();
  {name}_run(in, out, arena);
  unsigned long took = micros() - start;
  int best = 0;
  for (int i = 1; i < {upper}_OUTPUT_BYTES; i++) {{
    if (out[i] > out[best]) best = i;
  }}
  Serial.print("largest output: ");
  Serial.print(best);
  Serial.print(", microseconds: ");
  Serial.println(took);
  delay(1000);
}}
"""


def _zephyr(files: Mapping[str, bytes], facts: NetworkFacts) -> Mapping[str, bytes]:
    said = _described(facts)
    name, option = said["name"], f"EDGECOMP_{facts.name.upper()}"
    sources = "\n".join(f"    ${{CMAKE_CURRENT_SOURCE_DIR}}/../src/{n}" for n in files if n.endswith(".c"))
    return {
        "zephyr/module.yml": f"name: {name}\nbuild:\n  cmake: zephyr\n  kconfig: zephyr/Kconfig\n".encode(),
        "zephyr/CMakeLists.txt": f"""\
if(CONFIG_{option})
  zephyr_include_directories(${{CMAKE_CURRENT_SOURCE_DIR}}/../src)
  zephyr_library_named({name})
  zephyr_library_sources(
{sources})
endif()
""".encode(),
        "zephyr/Kconfig": f"""\
config {option}
\tbool "The network {facts.name}"
\thelp
\t  {said["sentence"]}
\t  {said["paragraph"]}
""".encode(),
        **_sources(files, facts),
    }


LAYOUTS: Mapping[str, Callable[[Mapping[str, bytes], NetworkFacts], Mapping[str, bytes]]] = MappingProxyType(
    {"flat": _flat, "arduino": _arduino, "platformio": _arduino, "zephyr": _zephyr}
)
"""What `export --layout` takes: a name, and what makes it."""
