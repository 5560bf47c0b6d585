{# Inside: count elements are at most the stride of y. #}
@compute @workgroup_size(1)
fn main() {
{% for i in range(count) %}
    y_put({{ i }}u, s{{ i }}_at(0u));
{% endfor %}
    for (var i = {{ count }}u; i < y_stride; i++) {
        y_put(i, 0.0);
    }
}
