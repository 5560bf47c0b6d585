// Scalars side by side, from element {{ first }} on; the last dispatch sets what follows the last of them to zero.
@compute @workgroup_size(1)
fn main() {
{% for i in range(count) %}
    y_put({{ first + i }}u, s{{ i }}_at(0u));
{% endfor %}
{% if last %}
    for (var i = {{ first + count }}u; i < y_stride; i++) {
        y_put(i, 0.0);
    }
{% endif %}
}
