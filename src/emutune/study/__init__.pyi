"""What measuring is imported for; drawing and reports wait until they are asked for."""

from .comparison import Effort as Effort
from .comparison import compare as compare
from .comparison_figure import draw_comparison as draw_comparison
from .comparison_figure import save_figure as save_figure
from .evaluate import decision_time_ms as decision_time_ms
from .evaluate import evaluate_policy as evaluate_policy
from .evaluate import held_out_episodes as held_out_episodes
from .reproduction import reproduce as reproduce
from .statistics import bootstrap_interval as bootstrap_interval
from .statistics import interquartile_mean as interquartile_mean
from .transfer import transferred as transferred
