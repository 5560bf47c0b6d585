// GEMM without workgroup memory: every invocation reads the operands of its {{ tm }} x {{ 4 * tn }} tile straight from the storage buffers.
// For software adapters, where barriers cost more than repeated loads. Neighbouring invocations take neighbouring columns.
// With `windows` the product is a convolution, see gemm_cooperative. With `splits`, layer z of the grid sums part z of K alone, of every product
// of a batch. An invocation takes at most {{ chunk }} steps, whose sums it adds up in blocks of {{ block }}.
{% set a_windows = windows in ["forward", "input"] %}
{% set b_windows = windows == "weight" %}
{% set b_taps = windows == "input" %}
{% if windows %}
{% include "shared/window" %}

{% if a_windows %}
fn a_window(start: vec2<u32>, tap: u32, cell: u32) -> vec4<f32> {
    let x = source(start, tap);
    if (!x.inside) {
        return vec4<f32>();
    }
    return a_load(x.row * a_stride + cell);
}
{% else %}
fn b_window(start: vec2<u32>, tap: u32, cell: u32) -> vec4<f32> {
    let x = source(start, tap);
    if (!x.inside) {
        return vec4<f32>();
    }
    return b_load(x.row * b_stride + cell);
}
{% endif %}
{% endif %}

@compute @workgroup_size({{ wx }}, {{ wy }})
fn main(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = gid.y * {{ tm }}u;
    let col = gid.x * {{ tn }}u;
    if (row >= {{ m }}u || col >= {{ width }}u) {
        return;
    }
{# Layer z of the grid computes product z of a batch, or of part z of K, or of both. #}
{% set product = "gid.z % " ~ batch ~ "u" if splits > 1 else "gid.z" %}
{% set a_first = product ~ " * " ~ a_rows ~ "u + " if batch > 1 else "" %}
{% set b_first = product ~ " * " ~ b_rows ~ "u + " if batch > 1 else "" %}
{% set first = "gid.z * " ~ m ~ "u + " if batch > 1 or splits > 1 else "" %}
{# Rows and columns outside the operands are read from the last one; their products are never stored. #}
{% if trans == "TN" %}
{% for i in range(tm // 4) %}
    let a_col{{ i }} = min(row / 4u + {{ i }}u, a_stride - 1u);
{% endfor %}
{% else %}
{% for i in range(tm) %}
{% if a_windows %}
    let a_start{{ i }} = origin(min(row + {{ i }}u, {{ m - 1 }}u));
{% else %}
    let a_row{{ i }} = ({{ a_first }}min(row + {{ i }}u, {{ m - 1 }}u)) * a_stride;
{% endif %}
{% endfor %}
{% endif %}
{% for j in range(tn) %}
{% if trans == "NT" %}
{% for c in range(4) %}
    let b_row{{ j }}_{{ c }} = ({{ b_first }}min(4u * (col + {{ j }}u) + {{ c }}u, {{ n - 1 }}u)) * b_stride;
{% endfor %}
{% elif b_windows %}
    let b_column{{ j }} = min(col + {{ j }}u, {{ n // 4 - 1 }}u);
    let b_tap{{ j }} = b_column{{ j }} / {{ cells }}u;
    let b_col{{ j }} = b_column{{ j }} % {{ cells }}u;
{% else %}
    let b_col{{ j }} = min(col + {{ j }}u, {{ ((tap_cells - 1) ~ "u") if b_taps else "b_stride - 1u" }});
{% endif %}
{% endfor %}
{% for i in range(tm) %}
{% for j in range(tn) %}
    var c{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}
{% endfor %}
{% macro step(depth) %}
{% if a_windows %}
        let tap = k / {{ cells }}u;
        let cell = k % {{ cells }}u;
{% endif %}
{% for j in range(tn) %}
{% if trans == "NT" %}
{% for c in range(4) %}
        let t{{ j }}_{{ c }} = b_load(b_row{{ j }}_{{ c }} + k);
{% endfor %}
{% for kk in range(depth) %}
        let b{{ kk }}_{{ j }} = vec4<f32>(t{{ j }}_0[{{ kk }}], t{{ j }}_1[{{ kk }}], t{{ j }}_2[{{ kk }}], t{{ j }}_3[{{ kk }}]);
{% endfor %}
{% else %}
{% for kk in range(depth) %}
{% if b_windows %}
        let b{{ kk }}_{{ j }} = b_window(origin(4u * k + {{ kk }}u), b_tap{{ j }}, b_col{{ j }});
{% elif b_taps %}
        let b{{ kk }}_{{ j }} = b_load((4u * cell + {{ kk }}u) * b_stride + tap * {{ tap_cells }}u + b_col{{ j }});
{% else %}
        let b{{ kk }}_{{ j }} = b_load(({{ b_first }}4u * k + {{ kk }}u) * b_stride + b_col{{ j }});
{% endif %}
{% endfor %}
{% endif %}
{% endfor %}
{% if trans == "TN" %}
{% for kk in range(depth) %}
{% for i in range(tm // 4) %}
        let a{{ kk }}_{{ i }} = a_load(({{ a_first }}4u * k + {{ kk }}u) * a_stride + a_col{{ i }});
{% endfor %}
{% for i in range(tm) %}
{% for j in range(tn) %}
        c{{ i }}_{{ j }} += a{{ kk }}_{{ i // 4 }}[{{ i % 4 }}] * b{{ kk }}_{{ j }};
{% endfor %}
{% endfor %}
{% endfor %}
{% else %}
{% for i in range(tm) %}
{% if a_windows %}
        let a{{ i }} = a_window(a_start{{ i }}, tap, cell);
{% else %}
        let a{{ i }} = a_load(a_row{{ i }} + k);
{% endif %}
{% for kk in range(depth) %}
{% for j in range(tn) %}
        c{{ i }}_{{ j }} += a{{ i }}[{{ kk }}] * b{{ kk }}_{{ j }};
{% endfor %}
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}
{# Of A * B^T both operands are zero in the padding behind K. #}
{% set steps = (k + 3) // 4 if trans == "NT" else k // 4 %}
{% if splits > 1 %}
    let part = gid.z / {{ batch }}u;
    let begin = part * {{ chunk }}u;
    let end = min(begin + {{ chunk }}u, {{ steps }}u);
{% else %}
    let begin = 0u;
    let end = {{ steps }}u;
{% endif %}
{% if chunk > block %}
{% for i in range(tm) %}
{% for j in range(tn) %}
    var kept{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}
{% endfor %}
    for (var k = begin; k < end;) {
        let stop = min(k + {{ block }}u, end);
        for (; k < stop; k++) {
{{ step(4) }}
        }
{% for i in range(tm) %}
{% for j in range(tn) %}
        kept{{ i }}_{{ j }} += c{{ i }}_{{ j }};
        c{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}
{% endfor %}
    }
{% for i in range(tm) %}
{% for j in range(tn) %}
    c{{ i }}_{{ j }} = kept{{ i }}_{{ j }};
{% endfor %}
{% endfor %}
{% else %}
    for (var k = begin; k < end; k++) {
{{ step(4) }}
    }
{% endif %}
{% if trans != "NT" and k % 4 != 0 %}
    {% if splits > 1 %}if (part == {{ splits - 1 }}u) {% endif %}{
        let k = {{ k // 4 }}u;
{{ step(k % 4) }}
    }
{% endif %}
{% for i in range(tm) %}
    if (row + {{ i }}u < {{ m }}u) {
{% for j in range(tn) %}
{% if width % tn == 0 %}
        finish({{ first }}row + {{ i }}u, col + {{ j }}u, c{{ i }}_{{ j }});
{% else %}
        if (col + {{ j }}u < {{ width }}u) {
            finish({{ first }}row + {{ i }}u, col + {{ j }}u, c{{ i }}_{{ j }});
        }
{% endif %}
{% endfor %}
    }
{% endfor %}
}
