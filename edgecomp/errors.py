"""The exceptions that a user of edgecomp can meet, all in one place.

::

    EdgecompError
      UsageError       an argument or a user's board file is unusable, or two arguments contradict each other
      DataError        images or labels cannot be read, or do not fit the model
      CaptureError     the model cannot be taken in (missing weights, NaN, another architecture)
        UnsupportedOp  ... because of one operator that edgecomp does not know
      PlanError        a plan is malformed or belongs to another model
      GraphError       a graph breaks the rules of its stage
      BudgetError      no plan satisfies the budget that was asked for
      ParityError      an exported file does not compute what it should
      ExportError      a format cannot express the graph
      TargetError      a runtime, toolchain or emulator is missing, a device fails, or too little is known of a board
      BundleError      a file of ours is damaged or of an unknown version

A message is one line: where, what was found, what was expected, what to do.
"""


class EdgecompError(Exception):
    """Root of everything edgecomp raises on purpose."""


class UsageError(EdgecompError):
    """An argument or a user's board file is unusable, or two arguments contradict each other."""


class DataError(EdgecompError):
    """Images or labels cannot be read, or do not fit the model."""


class CaptureError(EdgecompError):
    """The model cannot be taken in."""


class UnsupportedOp(CaptureError):
    """The model uses an operator that edgecomp does not know."""


class PlanError(EdgecompError):
    """A plan is malformed or belongs to another model."""


class GraphError(EdgecompError):
    """A graph breaks the rules of its stage: a defect of ours, or a damaged file."""


class BudgetError(EdgecompError):
    """No plan satisfies the budget that was asked for."""


class ParityError(EdgecompError):
    """An exported file does not compute what it should."""


class ExportError(EdgecompError):
    """A format cannot express the graph."""


class TargetError(EdgecompError):
    """A runtime, toolchain or emulator is missing, a device fails, or too little is known of a board."""


class BundleError(EdgecompError):
    """A file of ours is damaged or of an unknown version."""
