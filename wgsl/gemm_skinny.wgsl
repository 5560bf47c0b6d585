// GEMM for a few rows of A, which may be the windows of a convolution, B stored [n][k]: a workgroup computes {{ m }} rows x 4 columns. Its invocations share K, so that rows of B are read
// whole, once, by neighbours; then they add up. What bounds it is reading B. An invocation takes {{ (k + 4 * size - 1) // (4 * size) }} steps, many of them
// in blocks of {{ block }}.
{# Inside: Rows of B are clamped to n, a has m rows, k < ceil(K / 4) is below both strides. col < width. Surplus workgroups leave whole, before
   any barrier. Windows are read where `source` finds them inside the sample. #}
{% set lanes = size %}
{% set cols = 4 %}
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
    let col = group_id(wid);
    if (col >= {{ width }}u) {
        return;
    }
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
        let b{{ c }} = b_load(b_row{{ c }} + k);
{% endfor %}
{% for r in range(m) %}
        {
{% if windows %}
            let a = a_window(origin({{ r }}u), k / {{ cells }}u, k % {{ cells }}u);
{% else %}
            let a = a_load({{ r }}u * a_stride + k);
{% endif %}
            {{ to }}{{ r }} += vec4<f32>(dot(a, b0), dot(a, b1), dot(a, b2), dot(a, b3));
        }
{% endfor %}
{% endmacro %}
{% set steps = (k + 3) // 4 %}
{% if steps > 2 * block * size %}
    for (var begin = lid; begin < {{ steps }}u; begin += {{ block * size }}u) {
        let stop = min(begin + {{ block * size }}u, {{ steps }}u);
{% for r in range(m) %}
        var part{{ r }} = vec4<f32>();
{% endfor %}
        for (var k = begin; k < stop; k += {{ size }}u) {
{{ add("part") }}
        }
{% for r in range(m) %}
        sum{{ r }} += part{{ r }};
{% endfor %}
    }
{% else %}
    for (var k = lid; k < {{ steps }}u; k += {{ size }}u) {
{{ add("sum") }}
    }
{% endif %}
{% for r in range(m) %}
    let total{{ r }} = reduce(sum{{ r }}, lid);
{% endfor %}
{% for r in range(m) %}
    if (lid == {{ r }}u) {
        finish({{ r }}u, col, total{{ r }});
    }
{% endfor %}
}
