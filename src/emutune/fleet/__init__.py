"""A real fleet: a server that decides, devices that hold emulators and train, and the ledger of what happened."""
