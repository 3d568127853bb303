"""Real foundation models: cut into emulators, tuned through adapters, plugged back in."""
