"""The attribution methods: how gradients become maps."""
