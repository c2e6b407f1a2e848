"""``python -m decoct VERB ...`` is ``decoct VERB ...``."""

from decoct.launch.cli import main

if __name__ == "__main__":
    main()
