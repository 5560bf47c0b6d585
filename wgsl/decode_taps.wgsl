// One time step of a causal convolution's input, for every text: LayerNorm of its row of x, kept in a ring of the last {{ ring }} steps, and beside
// it the steps that the other taps read, oldest first; zeros where they lie before the start of the text.
//
// `lanes` invocations per row, `size / lanes` rows per workgroup. Each takes mean and variance of its own columns; one reduction makes
// them those of the row.
{# Inside: row is at most the last one, col < used, which is below the strides of x, gamma, beta and ring; a position modulo {{ ring }} is a
   slot of the row's own. tap * used + col < taps * used <= columns_stride. Word 1 of a row of state exists. #}
{% include "shared/group" %}
{% include "shared/moments" %}

// Zeros in the columns behind the last.
fn tail(col: u32, v: vec4<f32>) -> vec4<f32> {
{% if cols % 4 == 0 %}
    return v;
{% else %}
    return select(vec4<f32>(), v, carried(col) > vec4<f32>());
{% endif %}
}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
    let position = state_at(row * state_stride + 1u);
    let slots = row * {{ ring }}u;
    let now = (slots + position % {{ ring }}u) * ring_stride;
    let to = row * columns_stride;
    var n = 0.0;
    var sum = vec4<f32>();
    var square = vec4<f32>();
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
    var past{{ h }}_{{ tap }} = vec4<f32>();
    {
        let col = min(lane + {{ h * lanes }}u, {{ used - 1 }}u);
        var v = vec4<f32>();
{{ past(tap) }}
        past{{ h }}_{{ tap }} = v;
    }
{% endfor %}
{% endfor %}
    let shift = x0.x;
{% for h in range(held) %}
    let w{{ h }} = carried(lane + {{ h * lanes }}u);
    let d{{ h }} = w{{ h }} * (x{{ h }} - shift);
    n += across(w{{ h }});
    sum += d{{ h }};
{% endfor %}
    let mean = across(sum) / max(n, 1.0);
{% for h in range(held) %}
    {
        let e = d{{ h }} - w{{ h }} * mean;
        square += e * e;
    }
{% endfor %}
{% else %}
    let shift = x_load(row * x_stride + min(lane, {{ used - 1 }}u)).x;
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
        n += across(carried(col));
        sum += carried(col) * (x_load(row * x_stride + col) - shift);
    }
    let mean = across(sum) / max(n, 1.0);
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
        let e = carried(col) * ((x_load(row * x_stride + col) - shift) - mean);
        square += e * e;
    }
{% endif %}
    let moments = row_moments(vec4<f32>(shift, mean, across(square), n), lid);
    let first = moments.x;
    let off = moments.y;
    let rstd = inverseSqrt(moments.z * {{ 1.0 / cols }} + {{ eps }});
    if (wanted >= {{ rows }}u) {
        return;
    }
{% if held > 0 %}
{% for h in range(held) %}
    if (lane + {{ h * lanes }}u < {{ used }}u) {
        let col = lane + {{ h * lanes }}u;
        let y = tail(col, ((x{{ h }} - first) - off) * rstd * gamma{{ h }} + beta{{ h }});
        ring_store(now + col, y);
        columns_store(to + {{ (taps - 1) * used }}u + col, y);
{% for tap in range(taps - 1) %}
        columns_store(to + {{ tap * used }}u + col, past{{ h }}_{{ tap }});
{% endfor %}
    }
{% endfor %}
{% else %}
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
        let y = tail(col, ((x_load(row * x_stride + col) - first) - off) * rstd * gamma_load(col) + beta_load(col));
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
