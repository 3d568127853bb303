"""Learning to orchestrate: networks, HMPPO and IPPO, training and checkpoints."""
