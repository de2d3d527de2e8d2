"""LeRobot has an environment of its own; elsewhere there is nothing to test here."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("lerobot") else ["test_*.py"]
