"""The audit: is a cache still its teacher's, and what is it worth (docs/audit.md).

Data flow: `pick` chooses sequences -> `recompute` runs the teacher over them the way stage one does, once more as a control
with another batch shape and attention, and `reduce`s each sequence's logits at once to `RowFacts` (arrays of a few numbers
per row and per kept entry, kept in the report's folder so that a killed audit goes on) -> `findings` are pure statistics on
those arrays (and, without a teacher, on the stored record alone), p-values from `nulls`, one Holm over all of them ->
`measures` and `gradient` say what the cache is worth -> `result` is the audit.json. A trial of the power study
(benchmarks/audit.py) is `reduce.cached_facts` and `findings` on logits that are already there.
"""

from stillroom.pipeline.audit.line import AuditLine as AuditLine
from stillroom.pipeline.audit.line import audit_line as audit_line
