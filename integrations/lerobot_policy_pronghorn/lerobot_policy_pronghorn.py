"""LeRobot imports this module because of its name; it loads every method of Pronghorn that ships to LeRobot."""

import pronghorn.lerobot  # noqa: F401 - imported for what it registers
