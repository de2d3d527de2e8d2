"""Trains by a file of settings: `python -m pronghorn.vcpo.train --config examples/vcpo/addition.yaml`."""

from __future__ import annotations

from pronghorn.vcpo.trl.script import main

if __name__ == "__main__":
    main()
