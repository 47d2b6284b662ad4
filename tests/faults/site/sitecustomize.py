"""Found by Python processes that a case starts from nothing: the record of events, and the hook of the case."""

import os
import sys

if "FAULTS_LOG" in os.environ:
    sys.path.append(os.environ["FAULTS_PATH"])
    from faults import audit

    audit.record(int(os.environ["FAULTS_LOG"]))
    if os.environ["FAULTS_HOOK"]:
        audit.call(os.environ["FAULTS_HOOK"], os.environ["FAULTS_ROOM"])
