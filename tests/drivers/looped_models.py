"""The models that `looped.py` compares: how each is built, and one evaluation written out."""

from looped_attractor import Attractor
from looped_fpdm import Fpdm
from looped_hrm_text import HRM, TRM, Rins, Universal

MODELS = {
    "fpdm": Fpdm(),
    "attractor": Attractor("attractor.models.attractor.attractor", "Attractor"),
    "eqlm": Attractor("attractor.models.eqlm.eqlm", "EQLM"),
    "hrm_text": HRM(),
    "hrm_text_trm": TRM(),
    "hrm_text_ut": Universal(),
    "hrm_text_rins": Rins(),
}
