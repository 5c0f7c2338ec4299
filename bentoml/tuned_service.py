"""The service of service.py, made fast for a small model under load.

    BENTOML_CONFIG=tuned.yaml bentoml serve tuned_service:svc

The same paths, models and refusals. What it gives up: no access log, no tracing, no request ids; see README.md.
"""

import guard
import sklearn
from direct import DirectPredict
from service import make_service

# service.py has checked the rows already, and nobody changes the parameters of a trained model.
sklearn.set_config(assume_finite=True, skip_parameter_validation=True)
guard.cancel_timers()

svc = make_service(DirectPredict)
