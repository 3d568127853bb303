"""The device's side of a fleet. Needs neither JAX nor the server's libraries."""
