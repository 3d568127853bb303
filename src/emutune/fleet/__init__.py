"""A real fleet: a server that decides, devices that hold emulators and train, and the ledger of what happened."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
