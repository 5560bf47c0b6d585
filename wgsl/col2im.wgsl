// The transpose of im2col as a gather: every step collects from the windows that read it, in the order of the taps.
{# Inside: `cell` keeps row and col inside the result. A row of `columns` is read where `source` finds it inside its sample, so below the rows
   there are; column j C + c is below k C, for col < used and c < C. #}
{% include "shared/group" %}
{% include "shared/window" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/cell" %}

    var v = vec4<f32>();
    if (col < {{ used }}u) {
        let start = origin(row);
        for (var j = 0u; j < {{ kernel }}u; j++) {
            let dy = source(start, j);
            if (dy.inside) {
{% if channels % 4 == 0 %}
                v += x_load(dy.row * x_stride + j * {{ channels // 4 }}u + col);
{% else %}
                let base = dy.row * x_stride + j * {{ channels }}u;
                for (var lane = 0u; lane < min(4u, {{ channels }}u - 4u * col); lane++) {
                    v[lane] += x_at(base + 4u * col + lane);
                }
{% endif %}
            }
        }
    }
    finish(row, col, v);
}
