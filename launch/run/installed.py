"""Installed versions of packages."""

from importlib import metadata


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed. For decoct, the version of the running code."""
    # a checkout that is on the path without being installed has no metadata
    if package == "decoct":
        import decoct

        if own := getattr(decoct, "__version__", None):
            return own
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
