// GEMM for a few rows of A, which may be the windows of a convolution, B stored [n][k]: {{ lanes }} invocations compute {{ m }} rows x 4 columns. They share K, {{ each }} of it at a time, so that rows of
// B are read whole, once, by neighbours; then they add up. What bounds it is reading B, so there are enough invocations that most of B is
// asked for at once. An invocation takes {{ (steps + lanes - 1) // lanes }} steps, many of them in blocks of {{ block }}.
{# Inside: col is below width, rows of B are clamped to n, a has m rows; k < ceil(K / {{ each }}), which is at most both strides. Windows are
   read where `source` finds them inside the sample. #}
{% include "shared/group" %}
{% include "shared/reduce" %}
{% if windows %}
{% include "shared/window" %}

fn a_window(start: vec2<u32>, tap: u32, cell: u32) -> vec4<f32> {
    let x = source(start, tap);
    if (!x.inside) {
        return vec4<f32>();
    }
    return a_load(x.row * a_stride + cell);
}
{% endif %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let col = min(wanted, {{ width - 1 }}u);
{# Columns behind the last are computed as copies of it; `finish` stores zeros there. #}
{% for c in range(4) %}
    let b_row{{ c }} = min(4u * col + {{ c }}u, {{ n - 1 }}u) * b_stride;
{% endfor %}
{% for r in range(m) %}
    var sum{{ r }} = vec4<f32>();
{% endfor %}
{# Both operands are zero in the padding behind K. #}
{% macro add(to) %}
{% for c in range(4) %}
        let b{{ c }} = {% if windows %}b_load(b_row{{ c }} + k){% else %}b[b_row{{ c }} + k]{% endif %};
{% endfor %}
{% for r in range(m) %}
        {
{% if windows %}
            let x = a_window(origin({{ r }}u), k / {{ cells }}u, k % {{ cells }}u);
            {{ to }}{{ r }} += vec4<f32>(dot(x, b0), dot(x, b1), dot(x, b2), dot(x, b3));
{% else %}
            let x = a[{{ r }}u * a_stride + k];
{% for p in range(each // 4) %}
            let x{{ p }} = a_part{{ p }}(x);
            {{ to }}{{ r }} += vec4<f32>(dot(x{{ p }}, b_part{{ p }}(b0)), dot(x{{ p }}, b_part{{ p }}(b1)), dot(x{{ p }}, b_part{{ p }}(b2)), dot(x{{ p }}, b_part{{ p }}(b3)));
{% endfor %}
{% endif %}
        }
{% endfor %}
{% endmacro %}
{% if steps > 2 * block * lanes %}
    for (var begin = lane; begin < {{ steps }}u; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, {{ steps }}u);
{% for r in range(m) %}
        var part{{ r }} = vec4<f32>();
{% endfor %}
        for (var k = begin; k < stop; k += {{ lanes }}u) {
{{ add("part") }}
        }
{% for r in range(m) %}
        sum{{ r }} += part{{ r }};
{% endfor %}
    }
{% elif steps > 4 * lanes %}
    for (var k = lane; k < {{ steps }}u; k += {{ lanes }}u) {
{{ add("sum") }}
    }
{% else %}
{% for s in range((steps + lanes - 1) // lanes) %}
    {% if (s + 1) * lanes > steps %}if (lane < {{ steps - s * lanes }}u) {% endif %}{
        let k = lane + {{ s * lanes }}u;
{{ add("sum") }}
    }
{% endfor %}
{% endif %}
{% for r in range(m) %}
    let total{{ r }} = reduce(sum{{ r }}, lid);
{% endfor %}
    if (wanted >= {{ width }}u) {
        return;
    }
{% for r in range(m) %}
    if (lane == {{ r }}u) {
        finish({{ r }}u, col, total{{ r }});
    }
{% endfor %}
}
