"""Activations of a policy or a language model: hook points, a store that streams, and pairs of points."""
