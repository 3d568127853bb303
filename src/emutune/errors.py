"""The errors that emutune raises on purpose.

EmutuneError            something the user can put right; the command line prints it as one line
├── ScenarioError       a scenario file or override is wrong; names the field and the remedy
├── TraceError          a throughput trace is damaged, too short, or of another form
├── CheckpointError     a checkpoint is damaged, or belongs to another scenario or version
├── ModelError          a foundation model cannot be loaded, cut or compressed
├── DataError           text to tune on is missing, empty or unreadable
├── AdapterError        an adapter does not belong to the model it is loaded on
├── CatalogueError      a catalogue lacks something, or a shard of it is damaged
├── FleetError          a fleet's file, certificates, credentials or data are wrong
├── LedgerError         a ledger is damaged, or of another version
├── BoundError          a programme behind a certified bound was not solved
└── UsageError          a call or command asks for something that does not exist
"""

import textwrap

# Characters of a library's message that still read as one line.
_LONGEST = 400


class EmutuneError(Exception):
    """Base of every error whose message tells the user what to change."""


class ScenarioError(EmutuneError):
    """A scenario is invalid; the message names the field and the remedy."""


class TraceError(EmutuneError):
    """A throughput trace cannot be used; the message names the line and the remedy."""


class CheckpointError(EmutuneError):
    """A checkpoint cannot be used; the message says why and what to do."""


class ModelError(EmutuneError):
    """A foundation model cannot be loaded, cut or compressed; the message says what to change."""


class DataError(EmutuneError):
    """Text to tune on is missing, empty or unreadable; the message names the file and the remedy."""


class AdapterError(EmutuneError):
    """An adapter is damaged, or belongs to another model, another layer map or another kind."""


class CatalogueError(EmutuneError):
    """A catalogue lacks an emulator, or a shard of it is damaged; the message names it."""


class FleetError(EmutuneError):
    """A fleet's file, certificate, credentials, cache or data directory cannot be used."""


class LedgerError(EmutuneError):
    """A ledger is damaged, or was written by a newer version."""


class BoundError(EmutuneError):
    """A programme behind a certified bound was not solved; the message carries the solver's reason."""


class UsageError(EmutuneError):
    """A policy, scenario, option or path was asked for that does not exist or cannot be used."""


class TrainingInterruptedError(KeyboardInterrupt):
    """Ctrl-C during training, after a checkpoint was written; the same call resumes."""


def one_line(error: BaseException) -> str:
    """What a library's error says, without its line breaks; its name if it says nothing."""
    words = " ".join(str(error).split())
    return textwrap.shorten(words, _LONGEST, placeholder=" ...") or type(error).__name__
