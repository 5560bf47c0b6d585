// `lanes` invocations per row, `size / lanes` rows per workgroup. Mean, then variance around it, both of the differences to the first
// element of the row: the rounding of a large mean would swallow small deviations from it.
{# Inside: row is at most the last one, columns are clamped to used - 1 or below used, those finished below width. stats has three rows of its
   stride. #}
{% if held > 0 %}
// An invocation holds the differences of its {{ held }} vec4s of the row in registers: x is read once.
{% else %}
// The row is read three times, but for the first from a cache.
{% endif %}
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
    let first = x_load(row * x_stride).x;
    var sum = vec4<f32>();
{% if held > 0 %}
{% for h in range(held) %}
    let col{{ h }} = lane + {{ h * lanes }}u;
{% if (h + 1) * lanes > used %}
    let x{{ h }} = select(vec4<f32>(), tail(col{{ h }}, x_load(row * x_stride + min(col{{ h }}, {{ used - 1 }}u)) - first), col{{ h }} < {{ used }}u);
{% else %}
    let x{{ h }} = tail(col{{ h }}, x_load(row * x_stride + col{{ h }}) - first);
{% endif %}
{% endfor %}
{% for h in range(held) %}
    sum += x{{ h }};
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
        let d = tail(col{{ h }}, x{{ h }} - mean);
{% if (h + 1) * lanes > used %}
        sum += select(vec4<f32>(), d * d, col{{ h }} < {{ used }}u);
{% else %}
        sum += d * d;
{% endif %}
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
{% if (h + 1) * lanes > used %}
    if (col{{ h }} < {{ width }}u) {
        let at = min(col{{ h }}, {{ used - 1 }}u);
        finish(row, col{{ h }}, (x{{ h }} - mean) * rstd * gamma_load(at) + beta_load(at));
    }
{% else %}
    finish(row, col{{ h }}, (x{{ h }} - mean) * rstd * gamma_load(col{{ h }}) + beta_load(col{{ h }}));
{% endif %}
{% endfor %}
{% else %}
    for (var col = lane; col < {{ width }}u; col += {{ lanes }}u) {
        var y = vec4<f32>();
        if (col < {{ used }}u) {
            y = ((x_load(row * x_stride + col) - first) - mean) * rstd * gamma_load(col) + beta_load(col);
        }
        finish(row, col, y);
    }
{% endif %}
    if (lane == 0u) {
        stats_put(row, first);
        stats_put(stats_stride + row, mean);
        stats_put(2u * stats_stride + row, rstd);
        if (row == {{ rows - 1 }}u) {
            for (var i = {{ rows }}u; i < stats_stride; i++) {
                stats_put(i, 0.0);
                stats_put(stats_stride + i, 0.0);
                stats_put(2u * stats_stride + i, 0.0);
            }
        }
    }
}
