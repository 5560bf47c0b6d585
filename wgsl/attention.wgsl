// softmax(scale q k^T) v of every head, and the statistics of the softmax of every query. An invocation computes {{ each }} of the queries of one head
// with an online softmax: Milakov & Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135.
{% set kind = "forward" %}
{% include "shared/attention" %}
