"""What ``emutune`` has, and where from: the rooms, and of each what a first programme needs."""

from . import bounds as bounds
from . import errors as errors
from . import fleet as fleet
from . import learning as learning
from . import policies as policies
from . import scenario as scenario
from . import step as step
from . import study as study
from . import tuning as tuning
from . import world as world
from .bounds import certified_bounds as certified_bounds
from .errors import EmutuneError as EmutuneError
from .learning import TrainingConfig as TrainingConfig
from .learning import load_policy as load_policy
from .learning import register_learner as register_learner
from .learning import train_seed as train_seed
from .policies import baseline_policy as baseline_policy
from .policies import register_policy as register_policy
from .scenario import load_scenario as load_scenario
from .study import compare as compare
from .study import evaluate_policy as evaluate_policy
from .study import held_out_episodes as held_out_episodes
from .tuning import TuneConfig as TuneConfig
from .tuning import build_catalogue as build_catalogue
from .tuning import open_catalogue as open_catalogue
from .tuning import plug as plug
from .tuning import tune as tune
from .world import build_world as build_world

__version__: str
