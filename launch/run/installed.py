"""Which version of a package is here."""

from importlib import metadata


def installed_version(package: str) -> str | None:
    """Version of a package; None when it is not installed. Of decoct that of the code that runs, however it came onto the path."""
    if package == "decoct":
        import decoct

        if own := getattr(decoct, "__version__", None):
            return own
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
