"""The version, of the package and of pyproject.toml."""

__all__ = ["__version__"]

__version__ = "0.1.0"
