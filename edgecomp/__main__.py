"""`python -m edgecomp` is the same as `edgecomp`."""

from edgecomp.cli import entry

if __name__ == "__main__":
    entry()
