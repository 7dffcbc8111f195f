"""Our methods and other tools on one checkpoint: same images, one table of bytes and accuracy with its spread.

`python -m edgecomp.benchmarks.compression --help`. Modules: `results` (values and their files), `table`, `plot`,
`peers` (other tools in environments of their own), `context` (what every method is handed), `ours`, `methods` (the
table of all), `driver`. `peer_entry` and the `peer_*` scripts run in the peers' environments and stand alone.
"""
