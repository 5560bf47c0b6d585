// One time step of a causal convolution's input, for every text: LayerNorm of its row of x, kept in a ring of the last {{ ring }} steps, and beside
// it the steps that the other taps read, oldest first; zeros where they lie before the start of the text.
//
// `lanes` invocations per row, `size / lanes` rows per workgroup. Mean, then variance around it, both of the differences to the first
// element of the row: the rounding of a large mean would swallow small deviations from it.
{# Inside: row is at most the last one, col < used, which is below the strides of x, gamma, beta and ring; a position modulo {{ ring }} is a
   slot of the row's own. tap * used + col < taps * used <= columns_stride. Word 1 of a row of state exists. #}
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
    let first = x_load(row * x_stride).x;
    let position = state_at(row * state_stride + 1u);
    let slots = row * {{ ring }}u;
    let now = (slots + position % {{ ring }}u) * ring_stride;
    let to = row * columns_stride;
    var sum = vec4<f32>();
{% macro past(tap) %}
            let back = {{ (taps - 1 - tap) * dilation }}u;
            if (position >= back) {
                v = ring_load((slots + (position - back) % {{ ring }}u) * ring_stride + col);
            }
{% endmacro %}
{% if held > 0 %}
// Everything that is read is asked for before the first sum.
{% for h in range(held) %}
    let x{{ h }} = x_load(row * x_stride + min(lane + {{ h * lanes }}u, {{ used - 1 }}u));
    let gamma{{ h }} = gamma_load(min(lane + {{ h * lanes }}u, {{ used - 1 }}u));
    let beta{{ h }} = beta_load(min(lane + {{ h * lanes }}u, {{ used - 1 }}u));
{% for tap in range(taps - 1) %}
{% set back = (taps - 1 - tap) * dilation %}
    let past{{ h }}_{{ tap }} = select(vec4<f32>(), ring_load((slots + (position + {{ ring - back }}u) % {{ ring }}u) * ring_stride + min(lane + {{ h * lanes }}u, {{ used - 1 }}u)), position >= {{ back }}u);
{% endfor %}
{% endfor %}
{% for h in range(held) %}
    {
        let col = lane + {{ h * lanes }}u;
        sum += select(vec4<f32>(), tail(col, x{{ h }} - first), col < {{ used }}u);
    }
{% endfor %}
{% else %}
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
        sum += tail(col, x_load(row * x_stride + col) - first);
    }
{% endif %}
    let mean = across(reduce(sum, lid)) * {{ 1.0 / cols }};
    sum = vec4<f32>();
{% if held > 0 %}
{% for h in range(held) %}
    {
        let col = lane + {{ h * lanes }}u;
        let d = tail(col, (x{{ h }} - first) - mean);
        sum += select(vec4<f32>(), d * d, col < {{ used }}u);
    }
{% endfor %}
{% else %}
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
        let d = tail(col, (x_load(row * x_stride + col) - first) - mean);
        sum += d * d;
    }
{% endif %}
    let rstd = inverseSqrt(across(reduce(sum, lid)) * {{ 1.0 / cols }} + {{ eps }});
    if (wanted >= {{ rows }}u) {
        return;
    }
{% if held > 0 %}
{% for h in range(held) %}
    if (lane + {{ h * lanes }}u < {{ used }}u) {
        let col = lane + {{ h * lanes }}u;
        let y = tail(col, ((x{{ h }} - first) - mean) * rstd * gamma{{ h }} + beta{{ h }});
        ring_store(now + col, y);
        columns_store(to + {{ (taps - 1) * used }}u + col, y);
{% for tap in range(taps - 1) %}
        columns_store(to + {{ tap * used }}u + col, past{{ h }}_{{ tap }});
{% endfor %}
    }
{% endfor %}
{% else %}
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
        let y = tail(col, ((x_load(row * x_stride + col) - first) - mean) * rstd * gamma_load(col) + beta_load(col));
        ring_store(now + col, y);
        columns_store(to + {{ (taps - 1) * used }}u + col, y);
{% for tap in range(taps - 1) %}
        {
            var v = vec4<f32>();
{{ past(tap) }}
            columns_store(to + {{ tap * used }}u + col, v);
        }
{% endfor %}
    }
{% endif %}
    for (var col = {{ taps * used }}u + lane; col < columns_stride; col += {{ lanes }}u) {
        columns_store(to + col, vec4<f32>());
    }
}
