// The gradient for the queries, and dy y of every query. Probabilities are computed again from the statistics.
{% set kind = "query" %}
{% include "shared/attention" %}
