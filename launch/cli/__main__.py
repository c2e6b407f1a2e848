"""``python -m decoct.launch.cli VERB ...`` is ``decoct VERB ...``: how torchrun's workers and job files start decoct."""

from .app import main

if __name__ == "__main__":
    main()
