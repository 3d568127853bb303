"""The errors that emutune raises on purpose.

EmutuneError            something the user can put right; the command line prints it as one line
├── ScenarioError       a scenario file or override is wrong; names the field and the remedy
├── CheckpointError     a checkpoint is damaged, or belongs to another scenario or version
├── BoundError          a programme behind a certified bound was not solved
└── UsageError          a call or command asks for something that does not exist
"""


class EmutuneError(Exception):
    """Base of every error whose message tells the user what to change."""


class ScenarioError(EmutuneError):
    """A scenario is invalid; the message names the field and the remedy."""


class CheckpointError(EmutuneError):
    """A checkpoint cannot be used; the message says why and what to do."""


class BoundError(EmutuneError):
    """A programme behind a certified bound was not solved; the message carries the solver's reason."""


class UsageError(EmutuneError):
    """A policy, scenario, option or path was asked for that does not exist or cannot be used."""
