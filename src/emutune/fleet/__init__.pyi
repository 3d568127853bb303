"""A fleet's file, its run on this machine, and its ledger, which is read without any extra."""

from .comparison import Comparison as Comparison
from .comparison import Errors as Errors
from .comparison import StepComparison as StepComparison
from .comparison import compare_steps as compare_steps
from .comparison import errors as errors
from .config import FleetConfig as FleetConfig
from .config import load_fleet as load_fleet
from .ledger import Ledger as Ledger
from .local import LocalDevice as LocalDevice
from .local import local_devices as local_devices
from .local import run_local_fleet as run_local_fleet
