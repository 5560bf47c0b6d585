// dx = rstd (g - mean(g) - xhat mean(g xhat)), g = dy gamma. Both means in one reduction.
{# Inside: row is at most the last one, columns are clamped to used - 1 or below used, those finished below width. stats has three rows of its
   stride. #}
{% if blocks == 1 %}
// An invocation holds its {{ held }} vec4s of g and xhat in registers: x and dy are read once.
{% endif %}
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
    let first = stats_at(row);
    let mean = stats_at(stats_stride + row);
    let rstd = stats_at(2u * stats_stride + row);
    var g_sum = vec4<f32>();
    var gx_sum = vec4<f32>();
{% if blocks == 1 %}
{% for h in range(held) %}
    let col{{ h }} = lane + {{ h * lanes }}u;
{% if (h + 1) * lanes > used %}
    let at{{ h }} = min(col{{ h }}, {{ used - 1 }}u);
    let g{{ h }} = select(vec4<f32>(), tail(at{{ h }}, dy_load(row * dy_stride + at{{ h }}) * gamma_load(at{{ h }})), col{{ h }} < {{ used }}u);
{% else %}
    let at{{ h }} = col{{ h }};
    let g{{ h }} = tail(at{{ h }}, dy_load(row * dy_stride + at{{ h }}) * gamma_load(at{{ h }}));
{% endif %}
    let xhat{{ h }} = ((x_load(row * x_stride + at{{ h }}) - first) - mean) * rstd;
{% endfor %}
{% for h in range(held) %}
    g_sum += g{{ h }};
    gx_sum += g{{ h }} * xhat{{ h }};
{% endfor %}
{% else %}
    for (var begin = lane; begin < {{ used }}u; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, {{ used }}u);
        var g_part = vec4<f32>();
        var gx_part = vec4<f32>();
        for (var col = begin; col < stop; col += {{ lanes }}u) {
            let g = tail(col, dy_load(row * dy_stride + col) * gamma_load(col));
            g_part += g;
            gx_part += g * ((x_load(row * x_stride + col) - first) - mean) * rstd;
        }
        g_sum += g_part;
        gx_sum += gx_part;
    }
{% endif %}
    let sums = reduce(vec4<f32>(across(g_sum), across(gx_sum), 0.0, 0.0), lid) * {{ 1.0 / cols }};
    if (wanted >= {{ rows }}u) {
        return;
    }
{% if blocks == 1 %}
{% for h in range(held) %}
{% if (h + 1) * lanes > used %}
    if (col{{ h }} < {{ width }}u) {
        finish(row, col{{ h }}, rstd * (g{{ h }} - sums.x - xhat{{ h }} * sums.y));
    }
{% else %}
    finish(row, col{{ h }}, rstd * (g{{ h }} - sums.x - xhat{{ h }} * sums.y));
{% endif %}
{% endfor %}
{% else %}
    for (var col = lane; col < {{ width }}u; col += {{ lanes }}u) {
        var dx = vec4<f32>();
        if (col < {{ used }}u) {
            let g = dy_load(row * dy_stride + col) * gamma_load(col);
            let xhat = ((x_load(row * x_stride + col) - first) - mean) * rstd;
            dx = rstd * (g - sums.x - xhat * sums.y);
        }
        finish(row, col, dx);
    }
{% endif %}
}
