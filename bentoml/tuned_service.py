"""Serve the service of service.py, tuned for a small model under load.

    BENTOML_CONFIG=tuned.yaml bentoml serve tuned_service:svc

Paths, models and refusals are the same. It has no access log, no tracing and no request ids; see REFERENCE.md,
"Tuning".
"""

import guard
import sklearn
from direct import DirectPredict
from service import make_service

# service.py has already checked the rows, and the parameters of a trained model do not change.
sklearn.set_config(assume_finite=True, skip_parameter_validation=True)
guard.cancel_timers()

svc = make_service(DirectPredict)
