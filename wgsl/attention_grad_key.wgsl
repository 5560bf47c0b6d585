// The gradients for keys and values. Probabilities are computed again from the statistics.
{% set kind = "key" %}
{% include "shared/attention" %}
