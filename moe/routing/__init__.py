"""Routers: which experts a token goes to, and with what weight. One file each, behind `base.Router`."""
