"""The storage proxy of Mooring and the ground floor (`core`) that all its packages stand on."""

__version__ = "0.1.0"
